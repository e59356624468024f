"""What every room needs: errors, schemas, files, locks, devices, random numbers. Imports no other room."""
