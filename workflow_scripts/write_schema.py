"""Write config/schema.json from the settings, so that editors complete and check the files of experiments."""

import argparse

from llava_sft.config import CONFIG_DIR, json_schema
from llava_sft.files import write_json

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_json(CONFIG_DIR / "schema.json", json_schema())
