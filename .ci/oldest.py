"""Print the oldest versions that the installed package allows, as constraints for pip: `oldest.py [EXTRA...]`."""

import importlib.metadata
import re
import sys

NAME = re.compile(r"[\w.-]+")
OLDEST = re.compile(r"[>=]=\s*([\w.]+)")
EXTRA = re.compile(r"extra\s*==\s*[\"']([\w.-]+)[\"']")

for line in importlib.metadata.requires("flashmoe_gen") or []:
    requirement, _, marker = line.partition(";")
    extra = EXTRA.search(marker)
    if extra and extra[1] not in sys.argv[1:]:
        continue
    version = OLDEST.search(requirement)
    if version is None:
        sys.exit(f"{requirement.strip()} has no oldest version")
    print(f"{NAME.match(requirement)[0]}=={version[1]}")
