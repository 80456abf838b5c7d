"""Timetables of pipelines: schedules, their simulation, stragglers, and drawings."""
