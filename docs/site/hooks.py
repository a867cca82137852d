"""What MkDocs does not do itself: pages from elsewhere, MathML, large figures.

README, CHANGELOG and other texts have one place in the repository, from which
their pages are made; links between them and the pages of docs/ are turned to
what they are on the site. Formulas become MathML, which browsers show without
a script. A figure is a link to itself: on a phone its words are small.
"""

import html
import pathlib
import posixpath
import re

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]

# What is shown, or linked to, that is not in docs/: where it is on the site.
FROM_ELSEWHERE = {
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "CONTRIBUTING.md": "contributing.md",
  "sana_jax/assets/emoji_model/README.md": "emoji_model.md",
  "sana_jax/assets/emoji_model/curves.png": "images/emoji_model_curves.png",
  "sana_jax/assets/emoji_64/LICENSE": "emoji_64_licence.txt",
}
# An inline link or picture; code has no brackets before parentheses.
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\]\()([^)\s]+)(\))")
# The first page has its own table of contents, and no neighbours.
_HOME = "---\nhide:\n  - navigation\n---\n\n"
_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
_FIGURE = re.compile(r'<img\b[^>]*\bsrc="([^"]+)"[^>]*>')


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
  """Adds what is elsewhere in the repository."""
  for source, target in FROM_ELSEWHERE.items():
    path = ROOT / source
    content = path.read_bytes()
    if path.suffix == ".md":
      content = moved(content.decode(), source, target)
    if target == "index.md":
      content = _HOME + content
    files.append(File.generated(config, target, content=content))
  # To be downloaded; their folder is what it is in the repository.
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    content = path.read_bytes()
    files.append(
      File.generated(config, f"notebooks/{path.name}", content=content)
    )
  return files


def on_page_markdown(
  markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links from docs/ to what is elsewhere."""
  del config, files
  target = page.file.src_uri
  if target in FROM_ELSEWHERE.values():
    return markdown
  return moved(markdown, f"docs/{target}", target)


def on_page_content(
  content: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Makes MathML of formulas, and links of figures."""
  del page, config, files
  content = _FORMULA.sub(_mathml, content)
  return _FIGURE.sub(r'<a href="\1">\g<0></a>', content)


def moved(markdown: str, source: str, target: str) -> str:
  """Adapts links of a file of the repository to its place on the site."""

  def adapt(match: re.Match) -> str:
    path, hash_, anchor = match[2].partition("#")
    if not path or ":" in path:
      return match[0]
    there = place_of(posixpath.join(posixpath.dirname(source), path))
    relative = posixpath.relpath(there, posixpath.dirname(target) or ".")
    return f"{match[1]}{relative}{hash_}{anchor}{match[3]}"

  return _LINK.sub(adapt, markdown)


def place_of(path: str) -> str:
  """Returns where a path of the repository is on the site.

  What is in neither place keeps its path, and MkDocs reports it.
  """
  path = posixpath.normpath(path)
  if path in FROM_ELSEWHERE:
    return FROM_ELSEWHERE[path]
  return path.removeprefix("docs/")


def _mathml(match: re.Match) -> str:
  display = "inline" if match[2] == "(" else "block"
  return latex2mathml.converter.convert(
    html.unescape(match[3]), display=display
  )
