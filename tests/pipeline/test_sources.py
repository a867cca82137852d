"""Whatever a user names is recognised, or what may be named is listed."""

import json

import pytest
from etils import epath

from sana_jax.pipeline import sources
from sana_jax.weights import zoo
from tests import local_hub

ACCEPTED = "expected a directory in the layout of diffusers, an original .pth"
FILES = {
  "model_index.json": b'{"_class_name": "SanaSprintPipeline"}',
  "transformer/diffusion_pytorch_model.safetensors": b"t",
  "vae/diffusion_pytorch_model.safetensors": b"v",
  "text_encoder/model.safetensors": b"e",
}


@pytest.mark.parametrize(
  ("name", "is_sprint"),
  [
    ("SanaPipeline", False),
    ("SanaPAGPipeline", False),
    ("SanaControlNetPipeline", False),
    ("SanaSprintPipeline", True),
    ("SanaSprintImg2ImgPipeline", True),
  ],
)
def test_all_sana_pipelines_are_flow_or_sprint(tmp_path, name, is_sprint):
  index = tmp_path / "model_index.json"
  index.write_text(json.dumps({"_class_name": name}))
  expected = sources.Directory(epath.Path(tmp_path), None, is_sprint)
  assert sources.resolve(tmp_path) == expected
  index.write_text('{"_class_name": "SanaVideoPipeline"}')
  with pytest.raises(ValueError, match="SanaVideoPipeline; supported are Sana"):
    sources.resolve(tmp_path)


def test_directories_and_files_are_known_by_their_names(tmp_path):
  directory = tmp_path / "sana_1600m_2kpx_bf16_diffusers"
  (directory / "transformer").mkdir(parents=True)
  (directory / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
  (directory / "transformer" / "config.json").write_text(
    '{"_class_name": "SanaTransformer2DModel"}'
  )
  file = tmp_path / "Sana_600M_512px_MultiLing.pth"
  file.write_bytes(b"")
  large, small = zoo.find("Sana_1600M_2Kpx_BF16"), zoo.find("Sana_600M_512px")
  assert sources.resolve(directory).entry == large
  assert sources.resolve(directory / "transformer") == (
    sources.TransformerWeights(epath.Path(directory / "transformer"), large)
  )
  expected = sources.TransformerWeights(epath.Path(file), small)
  assert sources.resolve(file) == expected


def test_work_directories_are_recognised(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=f"no model_index.*{ACCEPTED}"):
    sources.resolve(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  assert sources.resolve(tmp_path) == sources.TrainingRun(epath.Path(tmp_path))


@pytest.mark.parametrize(
  "name", ["Sana_Sprint_0.6B_1024px", "sana_sprint_0.6b_1024px_diffusers"]
)
def test_published_names_are_downloaded(tmp_path, name):
  entry = zoo.find("Sana_Sprint_0.6B_1024px")
  with local_hub.serve(entry.diffusers_repo, FILES) as server:
    found = sources.resolve(name, cache_dir=tmp_path, endpoint=server.endpoint)
  assert found.entry == entry
  assert found.is_sprint
  assert (found.path / "vae/diffusion_pytorch_model.safetensors").is_file()


def test_repositories_of_others_are_downloaded_themselves(tmp_path):
  name = "somebody/Sana_Sprint_0.6B_1024px"
  with local_hub.serve(name, FILES) as server:
    found = sources.resolve(name, cache_dir=tmp_path, endpoint=server.endpoint)
  assert "models--somebody--" in str(found.path)
  # What they made is taken to be like what it is called after.
  assert found.entry == zoo.find("Sana_Sprint_0.6B_1024px")


@pytest.mark.parametrize(
  "name",
  ["sana_1600m_1024", "a/b/Sana_1600M_1024px", "Sana_1600M_1024px.pth"],
)
def test_what_is_nothing_lists_what_is_accepted_and_near(name):
  with pytest.raises(
    FileNotFoundError, match=f"{name} does not exist; {ACCEPTED}.*Sana_1600M_1"
  ):
    sources.resolve(name)


def test_a_slip_in_a_path_asks_no_hub(tmp_path, monkeypatch):
  (tmp_path / "runs").mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match="runs/emoij does not exist"):
    sources.resolve("runs/emoij")


def test_what_the_hub_lacks_is_told_with_what_is_accepted(tmp_path):
  with (
    local_hub.serve("a/b", FILES) as server,
    pytest.raises(
      FileNotFoundError,
      match=f"no local path.*no repository runs/emoji.*{ACCEPTED[9:]}",
    ),
  ):
    sources.resolve("runs/emoji", cache_dir=tmp_path, endpoint=server.endpoint)


def test_strange_files_are_refused(tmp_path):
  (tmp_path / "model.ckpt").write_text("")
  with pytest.raises(ValueError, match=r"suffix '\.ckpt'; expected a dir"):
    sources.resolve(tmp_path / "model.ckpt")
