"""Parts of `make gpu-check`: is the package right on a GPU?"""
