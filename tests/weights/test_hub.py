"""Downloading, from a real server that speaks the hub's protocol."""

import errno
import pathlib
import sys

import pytest

from sana_jax.pipeline import sources
from sana_jax.weights import hub, zoo
from tests import local_hub

REPO = "somebody/sana"
STEM = "diffusion_pytorch_model"
FILES = {
  "README.md": b"card",
  "model_index.json": b"{}",
  "scheduler/scheduler_config.json": b"{}",
  "tokenizer/tokenizer.json": b"{}",
  "transformer/config.json": b"{}",
  f"transformer/{STEM}-00001-of-00002.safetensors": b"plain 1",
  f"transformer/{STEM}-00002-of-00002.safetensors": b"plain 2",
  f"transformer/{STEM}.safetensors.index.json": b"index",
  f"transformer/{STEM}.fp16.safetensors": b"half",
  f"transformer/{STEM}.bin": b"pickle",
  "vae/config.json": b"{}",
  f"vae/{STEM}.safetensors": b"vae",
  "text_encoder/config.json": b"{}",
  "text_encoder/model.safetensors": b"text",
  "text_encoder/model.bf16-00001-of-00001.safetensors": b"brain",
  "text_encoder/model.safetensors.index.bf16.json": b"index",
}


@pytest.fixture
def server():
  with local_hub.serve(REPO, FILES) as made:
    yield made


@pytest.fixture
def options(server, tmp_path):
  return {"endpoint": server.endpoint, "cache_dir": tmp_path}


def contents(path):
  path = pathlib.Path(path)
  return {
    str(file.relative_to(path)): file.read_bytes()
    for file in path.rglob("*")
    if file.is_file()
  }


@pytest.mark.parametrize(
  ("variant", "transformer", "text_encoder"),
  [
    (
      None,
      ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors")
      + (".safetensors.index.json",),
      ("model.safetensors",),
    ),
    ("fp16", (".fp16.safetensors",), ("model.safetensors",)),
    (
      "bf16",
      ("-00001-of-00002.safetensors", "-00002-of-00002.safetensors")
      + (".safetensors.index.json",),
      ("model.bf16-00001-of-00001.safetensors",)
      + ("model.safetensors.index.bf16.json",),
    ),
  ],
)
def test_only_what_loading_needs_is_downloaded(
  options, variant, transformer, text_encoder
):
  found = contents(hub.download(REPO, variant=variant, **options))
  weights = {
    *(f"transformer/{STEM}{end}" for end in transformer),
    *(f"text_encoder/{name}" for name in text_encoder),
    f"vae/{STEM}.safetensors",
  }
  others = {name for name in FILES if name.endswith(("config.json", "r.json"))}
  assert found.keys() == weights | others | {"model_index.json"}
  assert all(found[name] == FILES[name] for name in found)


def test_only_the_weights_of_the_components_asked_for_are_downloaded(options):
  found = contents(hub.download(REPO, components=["vae"], **options))
  weights = {name for name in found if name.endswith(".safetensors")}
  assert weights == {f"vae/{STEM}.safetensors"}
  assert "text_encoder/config.json" in found


def test_published_names_lead_to_their_repository(server, options):
  entry = zoo.find("Sana_1600M_1024px_BF16")
  server.repo = entry.diffusers_repo
  path = hub.download(entry, **options)
  assert zoo.find(str(path)) == entry
  with pytest.raises(FileNotFoundError, match="`hf download .*teacher check"):
    hub.download(zoo.find("Sana_Sprint_1.6B_1024px_teacher"), **options)


def test_a_second_download_asks_for_no_file(server, options):
  hub.download(REPO, **options)
  server.requests.clear()
  hub.download(REPO, **options)
  assert server.requests
  assert not [r for r in server.requests if r.startswith(f"GET /{REPO}/res")]


def test_what_is_in_the_cache_needs_no_connection(server, options):
  path = hub.download(REPO, **options)
  offline = options | {"endpoint": local_hub.unreachable()}
  assert hub.download(REPO, **offline) == path
  # Weights of another variant were never asked for: loading would say so.
  assert contents(path).keys() == contents(hub.download(REPO, **offline)).keys()


def test_without_connection_and_cache_the_remedy_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="cannot be reached.*pass its d"):
    hub.download(REPO, endpoint=local_hub.unreachable(), cache_dir=tmp_path)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["/api/", ".safetensors"])
def test_gated_repositories_tell_how_to_get_in(server, options, status, where):
  server.refused = (status, "GatedRepo", where)
  with pytest.raises(PermissionError, match=r"accept its licence.*auth login"):
    hub.download(REPO, **options)


def test_absent_repositories_list_near_names(options):
  name = "Efficient-Large-Model/Sana_1600M_1024px_BF61_diffusers"
  with pytest.raises(FileNotFoundError, match="private.*Sana_1600M_1024px_BF"):
    hub.download(name, **options)


def test_absent_revisions_and_variants_are_named(server, options):
  with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
    hub.download(REPO, revision="v9", **options)
  with pytest.raises(FileNotFoundError, match="variant 'fp8', only"):
    hub.download(REPO, variant="fp8", **options)


def test_a_failing_server_is_reported_in_one_line(server, options):
  server.refused = (418, "Teapot", ".safetensors")
  with pytest.raises(OSError, match="sana failed .*try again") as error:
    hub.download(REPO, **options)
  assert "\n" not in str(error.value)


def test_a_full_disk_is_called_that():
  with open("/dev/full", "w") as full:
    full.write("x")
    with pytest.raises(OSError, match="No space") as caught:
      full.flush()
    with pytest.raises(OSError, match="disk is full: a/b .*make room") as error:
      raise hub._failed("a/b", caught.value)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space"):
      full.close()


def test_without_the_library_the_command_to_install_it_is_given(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ImportError, match=r"pip install 'sana_jax\[hub\]'"):
    hub.download(REPO)


def test_a_controlnet_comes_with_its_pipeline(tmp_path):
  control = {
    "controlnet/config.json": b"{}",
    f"controlnet/{STEM}.safetensors": b"control",
  }
  with local_hub.serve(REPO, FILES | control) as server:
    path = hub.download(REPO, endpoint=server.endpoint, cache_dir=tmp_path)
  assert contents(path).items() >= control.items()


def test_one_file_of_a_repository_is_downloaded(tmp_path):
  published = zoo.lookup_controlnet("Sana_600M_1024px_ControlNet_HED")
  with local_hub.serve(published.repo, {published.file: b"weights"}) as server:
    where = {"endpoint": server.endpoint, "cache_dir": tmp_path}
    path = sources.resolve_controlnet(published.repo, **where)
    assert path.read_bytes() == b"weights"
    again = sources.resolve_controlnet(
      published.repo.partition("/")[2], **where
    )
    assert again == path
    assert sources.resolve_controlnet(path, **where) == path
  offline = {"endpoint": local_hub.unreachable(), "cache_dir": tmp_path / "no"}
  with pytest.raises(FileNotFoundError, match="hub cannot be reached"):
    sources.resolve_controlnet(published.repo, **offline)
  with pytest.raises(FileNotFoundError, match="or one of Sana_1600M_1024px_BF"):
    sources.resolve_controlnet("nowhere/else")


def test_a_file_that_is_not_there_is_named(server, options):
  server.refused = (404, "EntryNotFound", "/resolve/")
  with pytest.raises(FileNotFoundError, match="no such file"):
    hub.download_file(REPO, "missing.pth", **options)
