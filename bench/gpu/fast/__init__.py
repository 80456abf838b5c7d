"""Parts of `make gpu-bench`: how fast is the package on a GPU?"""
