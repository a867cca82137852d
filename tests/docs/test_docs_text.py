"""What the documents name is there: pages, anchors, flags, fields, files."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import urllib.parse

import pytest

from sana_jax import config as config_lib
from sana_jax.app import limits
from sana_jax.weights import zoo
from tests.docs import reading, running

pages = pytest.mark.parametrize("page", reading.PAGES, ids=reading.name)
# Flags of other programs that the documents speak of.
_OF_OTHERS = {
  *("accelerator", "zone", "worker", "command", "version"),  # gcloud
  *("signal", "runtime", "diffusers"),  # Slurm
  *("screenshot", "jaxtyping", "init"),
}


def github_anchor(heading: str) -> str:
  """Returns the anchor that GitHub gives a heading."""
  plain = re.sub(r"[`*]", "", heading).strip().lower()
  return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def site_anchor(heading: str) -> str:
  """Returns the anchor that Python-Markdown gives a heading."""
  plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
  return re.sub(r"[-\s]+", "-", plain)


@pages
def test_links_lead_to_files_and_headings_that_exist(page):
  for link in reading.links(page):
    url = urllib.parse.urlsplit(link)
    if url.scheme:
      assert url.scheme == "https", f"{link} is not https"
      assert "." in url.netloc, f"{link} has no host"
      continue
    target = page.parent / url.path if url.path else page
    assert target.exists(), f"{link}: there is no such file"
    if not url.fragment:
      continue
    headings = reading.headings(target)
    for anchor in (github_anchor, site_anchor):
      found = [anchor(heading) for heading in headings]
      assert url.fragment in found, f"{link}: {anchor.__name__} has {found}"


@pages
def test_commands_have_flags_that_exist(page):
  for command in reading.commands(page):
    known = reading.flags_of(command.program)
    if command.program == "sana_jax.precompute.beam":
      known |= {"runner"}  # and whatever else Beam has
    given = {
      word.removeprefix("--").partition("=")[0].partition(".")[0]
      for word in command.argv
      if word.startswith("--")
    }
    # A boolean may be negated.
    given = {n if n in known else n.removeprefix("no") for n in given}
    assert given <= known, f"{command}: {sorted(given - known)}"


@pages
def test_the_text_names_only_flags_that_exist(page):
  if page.name == "CHANGELOG.md":  # speaks of what was, too
    return
  programs = {
    command.program
    for every in reading.PAGES
    for command in reading.commands(every)
  }
  programs.add("sana_jax.precompute.finalise")
  known = set().union(*map(reading.flags_of, programs)) | _OF_OTHERS
  known |= {"help", "verbosity", "pre"}
  for span in re.findall(r"`[^`\n]+`", reading.prose(page)):
    for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", span):
      name = flag if flag in known else flag.removeprefix("no")
      assert name in known, f"--{flag} in {span}"


def fields(cls: type, prefix: str = "") -> set[str]:
  """Returns the dotted names of a config's fields."""
  found = set()
  for field in dataclasses.fields(cls):
    name = prefix + field.name
    found.add(name)
    value = getattr(cls(), field.name)
    if dataclasses.is_dataclass(value):
      found |= fields(type(value), f"{name}.")
    elif isinstance(value, dict):
      found |= {f"{name}.{key}" for key in value}
  return found


def known_fields() -> set[str]:
  return fields(config_lib.TextToImageConfig) | fields(
    config_lib.AutoencoderConfig
  )


# Fields of these dictionaries are anything.
_FREE = ("hardware.compiler_options.", "optim.lr_multipliers.")


@pages
def test_fields_of_configs_exist(page):
  known = known_fields()
  named = set(re.findall(r"--config\.([\w.]+\w)", reading.text(page)))
  sections = "data|optim|flow|mesh|checkpoint|anomalies|hardware|model"
  spans = " ".join(re.findall(r"`[^`\n]+`", reading.prose(page)))
  named |= {
    found
    for found in re.findall(rf"(?<![\w./-])((?:{sections})\.\w+)", spans)
    if not found.endswith((".json", ".jsonl", ".safetensors", ".py"))
  }
  for name in named:
    name = re.sub(r"^stages\.\w+\.", "", name)
    assert name in known or name.startswith(_FREE), f"{name} in {page}"


@pages
def test_files_and_modules_exist(page):
  if page.name == "CHANGELOG.md":  # speaks of what was, too
    return
  text = reading.text(page)
  paths = r"(?<![\w/.-])((?:configs|tests|docs|bench|sana_jax)/[\w./-]*\w)"
  for path in re.findall(paths, text):
    assert path == "configs/x.py" or (reading.ROOT / path).exists(), path
  for name in set(re.findall(r"(?<![\w./-])(sana_jax(?:\.\w+)+)", text)):
    assert exists(name), name


def exists(name: str) -> bool:
  """Says whether a dotted name is a module, or something in one."""
  parts = name.split(".")
  for length in range(len(parts), 0, -1):
    try:
      spec = importlib.util.find_spec(".".join(parts[:length]))
    except ModuleNotFoundError:
      continue
    if spec is not None:
      if not parts[length:]:  # what it imports may not be installed
        return True
      found = importlib.import_module(".".join(parts[:length]))
      for part in parts[length:]:
        if not hasattr(found, part):
          return False
        found = getattr(found, part)
      return True
  return False


def literals() -> list[str]:
  """Returns the texts in the sources, values in them as an ellipsis."""
  found = []
  sources = [*(reading.ROOT / "sana_jax").rglob("*.py")]
  sources += [reading.ROOT / name for name in ("train.py", "sample.py")]
  for path in sources:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(part, "value", "…") for part in node.values]
        found.append(
          "".join(part if isinstance(part, str) else "…" for part in parts)
        )
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(re.sub(r"%[sdg]|\{\w+!?r?\}", "…", node.value))
  return found


def test_quoted_messages_are_those_of_the_code():
  page = reading.ROOT / "docs/troubleshooting.md"
  quoted = [
    b.text.strip() for b in reading.blocks(page) if b.language == "text"
  ]
  assert len(quoted) > 20
  said = "\n".join(" ".join(literal.split()) for literal in literals())
  for message in quoted:
    for piece in re.split("…|[;:] ", message):
      if len(piece.split()) > 1:
        assert piece.strip(" ,;:.()") in said, f"{piece!r} of {message!r}"


def test_the_zoo_page_is_the_table_of_the_package():
  text = reading.text(reading.ROOT / "docs/zoo.md")
  rows = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in text.splitlines()
    if line.startswith("| `")
  ]
  transformers = [
    [
      *(entry.name, str(entry.resolution), entry.precision),
      "SCM"
      if entry.is_sprint
      else f"Flow-DPM-Solver++, {entry.solver.flow_shift:g}",
      str(entry.num_inference_steps),
      *(f"{entry.guidance_scale:g}", entry.licence),
    ]
    for entry in zoo.ENTRIES
  ]
  controls = [
    [net.repo.partition("/")[2], net.base, net.precision, net.licence]
    for net in zoo.CONTROLNETS
  ]
  autoencoders = [[each.repo, each.licence] for each in zoo.AUTOENCODERS]
  assert rows == transformers + controls + autoencoders
  assert zoo.TEXT_ENCODER_LICENCE in " ".join(text.split())


def test_the_table_of_a_servers_limits_is_that_of_the_package():
  rows = re.findall(
    r"^\| `--(\w+)` \| ([^|]+) \|",
    reading.text(reading.ROOT / "docs/serving.md"),
    re.MULTILINE,
  )
  had = dataclasses.asdict(limits.Limits())
  assert had.pop("max_pixels") is None
  assert limits.PIXELS_PER_NATIVE == 2
  assert dict(rows).pop("max_pixels") == "twice the trained area"
  assert {n: int(v) for n, v in rows if n != "max_pixels"} == had


@pages
def test_every_line_of_shell_is_run_or_has_a_reason(page):
  if page.name == "CHANGELOG.md":
    return
  targets = re.findall(
    r"^([\w-]+):", (reading.ROOT / "Makefile").read_text(), re.MULTILINE
  )
  for block in reading.blocks(page):
    if block.language != "sh":
      continue
    for line in block.text.replace("\\\n", " ").splitlines():
      if not line.strip() or any(reading.commands_in(line)):
        continue
      if found := re.match(r"make ([\w-]+)", line):
        assert found[1] in targets, line
        if found[1] == "demo":
          continue
      assert any(re.search(other, line) for other in running.OTHERS), line
