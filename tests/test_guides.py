"""What the READMEs tell people to type: programs, files, settings and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import PROGRAMS
from pipeline.config import Config, flatten
from tests.ranks import ROOT

GUIDES = sorted(
    path for path in ROOT.rglob("*.md") if path.relative_to(ROOT).parts[0] not in {".venv", "runs", "data", "build"}
)
OTHER_PROGRAMS = {"accelerate", "pip", "python", "sbatch", "source", "docker", "npm", "pytest", "tensorboard", "tar"}
KEYS = set(flatten(Config()))
OF_KEYS = re.compile(r"--((?:run|data|network|training|evaluation|runtime)\.[\w.]+)")
NAMED_KEY = re.compile(r"(?:data|network|training|evaluation|runtime)\.\w+[\w.]*")
SOURCES = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
OPTIONS = set(re.findall(r"\"(--?\w[\w-]*)\"", SOURCES))
OPTIONS |= {f"--{name}" for name in re.findall(r"(\w+): (?:Path|str|int|bool)\b", SOURCES)}
OPTIONS |= {"--image", "--label", "--help", "--print_config"}
"""What programs take beside settings: their arguments, or parameters of functions that are made commands."""


def commands(guide: Path) -> list[list[str]]:
    """The words of each command in a guide's blocks of shell code, without comments, here-documents and directories of
    its writer's."""
    blocks = re.findall(r"```bash\n(.*?)```", guide.read_text(), re.S)
    text = "\n".join(re.sub(r"<<'END'\n.*?\nEND\n", "\n", block, flags=re.S) for block in blocks).replace("\\\n", " ")
    text = "\n".join([text, *(span for span in spans(guide) if span.startswith("gan-pipeline "))])
    return [words for line in re.split(r"\n|&&", text) if (words := shlex.split(line, comments=True))]


def spans(guide: Path) -> list[str]:
    """The pieces of code within a guide's sentences; a change log names what is no more."""
    text = re.sub(r"```.*?```", "", guide.read_text(), flags=re.S)
    return [] if guide.stem == "CHANGELOG" else re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_exists(guide: Path) -> None:
    for words in commands(guide):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        program, line = words[0], " ".join(words)
        if program == "gan-pipeline":
            assert words[1] in PROGRAMS, line
            options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z][\w-]*(=|$)", word)}
            assert options <= OPTIONS, line
        else:
            assert program in OTHER_PROGRAMS or (ROOT / program).is_file(), line
        for word in words:
            if re.fullmatch(r"(\./)?(pipeline|configs|launch|tests)/[\w./-]+", word):
                assert (ROOT / word).exists(), line
        for module in re.findall(r"-m ((?:pipeline|tests)[\w.]*)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), line
        for name in re.findall(r"--config (\S+)", line):
            assert (ROOT / name).is_file() or (ROOT / f"configs/{name}.yaml").is_file() or "runs/" in name, line
        for key in OF_KEYS.findall(line):
            assert any(known == key or known.startswith(f"{key}.") for known in KEYS), line
    named = [span for span in spans(guide) if NAMED_KEY.fullmatch(span) or span.startswith("--")]
    for key in [key for span in named for key in NAMED_KEY.findall(span)]:
        assert any(known == key or known.startswith(f"{key}.") for known in KEYS), key


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(guide: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", guide.read_text()):
        assert (guide.parent / target).exists(), target


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
