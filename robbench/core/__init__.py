"""Basics of all rooms: errors, schemas, files, locks, devices, random numbers. Imports no other room."""
