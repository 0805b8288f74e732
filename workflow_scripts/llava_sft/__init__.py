"""What the workflow's scripts share. Nothing here is imported by name from outside `workflow_scripts/`."""

__version__ = "0.1.0"
