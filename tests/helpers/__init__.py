"""What several test files share. Nothing here is collected, and no test file is imported by another."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "config/models"
SCRIPTS = ROOT / "workflow_scripts"
