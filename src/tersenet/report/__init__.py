"""Pages that show a file and the run that made it: `page.py` has `report` and `compare`."""
