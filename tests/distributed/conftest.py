"""The digits that evaluations are tested with."""

from tests.evaluation.conftest import digits as digits
from tests.evaluation.conftest import digits_files as digits_files
