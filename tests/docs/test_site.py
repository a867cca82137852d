"""The site is built without a warning, and its figures without a hand."""

import os
import pkgutil
import re
import subprocess
import sys

import pytest

from tests.docs import reading, running

pytestmark = pytest.mark.docs

IMAGES = reading.ROOT / "docs/images"
# `make demo` writes it.
NOT_DRAWN = {"grid.png", "page.png", "page_phone.png"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  path = tmp_path_factory.mktemp("site")
  result = subprocess.run(
    [*(sys.executable, "-m", "mkdocs", "build", "--strict"), f"-d{path}"],
    cwd=reading.ROOT,
    env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert "WARNING" not in result.stderr
  return path


def test_pages_load_nothing_from_another_host(site):
  files = [*site.rglob("*.html"), *site.rglob("*.css")]
  assert len(files) > 25
  loads = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//"
    r"|<link\b[^>]*\brel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?"
    r"(?:https?:)?//"
    r"|url\([\"']?(?:https?:)?//"
    r"|@import\s+[\"'](?:https?:)?//"
  )
  for file in files:
    found = loads.search(file.read_text(encoding="utf-8"))
    assert found is None, f"{file.name}: {found[0]}"


def test_formulas_are_mathml(site):
  page = (site / "method/model.html").read_text(encoding="utf-8")
  assert page.count("<math ") > 10
  assert "arithmatex" not in page


def test_figures_are_links_to_themselves(site):
  page = site / "guides/pretraining.html"
  linked = re.findall(
    r'<a href="([^"]+)"><img [^>]*src="([^"]+)"', page.read_text("utf-8")
  )
  assert linked
  for target, shown in linked:
    assert target == shown
    assert (page.parent / shown).is_file()


def test_no_class_is_shown_twice(site):
  for path in (site / "api").glob("*.html"):
    text = path.read_text(encoding="utf-8")
    names = re.findall(r'<h\d id="(sana_jax[\w.]*\.[A-Z]\w*)"', text)
    shown = [pkgutil.resolve_name(name) for name in names]
    assert len(set(shown)) == len(shown), f"{path.name}: {names}"


def test_signatures_show_shapes_as_they_are_written(site):
  page = (site / "api/diffusion.html").read_text(encoding="utf-8")
  plain = re.sub(r"<[^>]+>", "", page).replace("&#34;", '"')
  plain = plain.replace("&quot;", '"')
  assert 'Float[Array, "b *shape"]' in plain
  assert 'Float[Array, "b"]' in plain


def test_figures_are_drawn_and_those_that_are_there(tmp_path):
  subprocess.run(
    [*(sys.executable, "-m", "docs.figures"), f"--output={tmp_path}"],
    cwd=reading.ROOT,
    env=running.environment(reading.ROOT),
    check=True,
  )
  drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
  kept = {path.name: path.stat().st_size for path in IMAGES.iterdir()}
  assert set(drawn) == set(kept) - NOT_DRAWN
  # Other versions of Matplotlib may write other bytes, not half of them.
  for name, size in drawn.items():
    assert size == pytest.approx(kept[name], rel=0.3), name
