"""The steps of execute_ssd_notebook.py, one file each, and what they share."""
