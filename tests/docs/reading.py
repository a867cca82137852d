"""Takes the documents apart: code blocks, commands, headings, links."""

import ast
import functools
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
CARD = ROOT / "sana_jax/assets/emoji_model/README.md"
PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
  CARD,
  *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# An example that is set by four spaces, after an empty line.
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}\S.*\n)+)")
_OURS = re.compile(r"(?:^|\s)(?:train|sample)\.py |-m (?:sana_jax|bench)\.")


class Block(NamedTuple):
  """A block of code, and the language that its fence names."""

  language: str
  text: str


class Command(NamedTuple):
  """A command of this project that a page says to type.

  Attributes:
    page: that has it, in the repository.
    program: "train.py", "sample.py" or a module, such as "sana_jax.plan".
    argv: what follows.
  """

  page: str
  program: str
  argv: tuple[str, ...]

  def __str__(self) -> str:
    return f"{self.page}: {self.program} {shlex.join(self.argv)}"


def name(page: pathlib.Path) -> str:
  return str(page.relative_to(ROOT))


@functools.cache
def text(page: pathlib.Path) -> str:
  return page.read_text(encoding="utf-8")


def blocks(page: pathlib.Path) -> list[Block]:
  """Returns the fenced blocks of a page, dedented."""
  return [
    Block(language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE))
    for indent, language, content in _FENCE.findall(text(page))
  ]


def prose(page: pathlib.Path) -> str:
  """Returns what is in no block."""
  return _INDENTED.sub("", _FENCE.sub("", text(page)))


def commands(page: pathlib.Path) -> Iterator[Command]:
  """Yields the commands of this project, in their order."""
  shell = [block.text for block in blocks(page) if block.language == "sh"]
  shell += _INDENTED.findall(_FENCE.sub("", text(page)))
  for line in "\n".join(shell).replace("\\\n", " ").splitlines():
    for part in commands_in(line):
      yield _command(name(page), part)


def commands_in(line: str) -> Iterator[str]:
  """Yields what of a line of shell is a command of this project."""
  for part in re.split(r"\s+#\s.*$|;|&&", line):
    if _OURS.search(f"{part} "):
      yield part


def _command(page: str, line: str) -> Command:
  # What stands around it is another program's, and its closing quote too.
  line = line.strip()
  words = shlex.split(line[:-1] if line.count('"') % 2 else line)
  for i, word in enumerate(words):
    if word in ("train.py", "sample.py"):
      return Command(page, word, tuple(words[i + 1 :]))
    if word == "-m":
      return Command(page, words[i + 1], tuple(words[i + 2 :]))
  raise AssertionError(f"{page}: no command of ours in {line!r}")


def headings(page: pathlib.Path) -> list[str]:
  without = _FENCE.sub("", text(page))
  return re.findall(r"^#+ (.+?)\s*$", without, re.MULTILINE)


def links(page: pathlib.Path) -> list[str]:
  """Returns the targets of all links and pictures."""
  without = re.sub(r"`[^`\n]*`", "", prose(page))
  return re.findall(r"\]\(([^)\s]*)\)", without)


@functools.cache
def flags_of(program: str) -> frozenset[str]:
  """Returns the names of a program's flags, from its source."""
  if program.endswith(".py"):
    path = ROOT / program
  else:
    path = ROOT / program.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  names = set(_defined(path))
  for module in _imported(path):
    names |= set(_defined(module))
  return frozenset(names)


def _defined(path: pathlib.Path) -> Iterator[str]:
  nodes = list(ast.walk(_parsed(path)))
  aliases = dict(_aliases(nodes))
  for node in nodes:
    if not isinstance(node, ast.Call) or not node.args:
      continue
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    called = aliases.get(called, called)
    value = getattr(node.args[0], "value", None)
    if called.startswith("DEFINE_") or (
      called == "add_argument" and value.startswith("--")
    ):
      yield value.removeprefix("--")


def _aliases(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
  """Yields what functions are called for short: add = parser.add_argument."""
  for node in nodes:
    if isinstance(node, ast.Assign):
      (target,), value = node.targets[:1], node.value
      pairs = [(target, value)]
      if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=True))
      for name_, function in pairs:
        if isinstance(name_, ast.Name) and isinstance(function, ast.Attribute):
          yield name_.id, function.attr


def _imported(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the files of the package that one imports by `from`."""
  for node in ast.walk(_parsed(path)):
    if isinstance(node, ast.ImportFrom) and node.module:
      folder = ROOT / node.module.replace(".", "/")
      for alias in node.names:
        found = folder / f"{alias.name}.py"
        if found.exists():
          yield found


@functools.cache
def _parsed(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"))
