"""`python -m pipeline.config [--config FILE] [--KEY VALUE ...]` prints the folder of the run that the settings give."""

from __future__ import annotations

import sys

from pipeline.config import make_parser, parse
from pipeline.errors import UserError

if __name__ == "__main__":
    try:
        print(parse(make_parser("Print the folder of the run that the settings give."))[0].folder)
    except UserError as error:
        sys.exit(f"error: {error}")
