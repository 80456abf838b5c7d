"""Profiles of this machine by measurements."""
