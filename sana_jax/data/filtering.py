"""Which records a run leaves out although they could be read."""

from concurrent import futures

from sana_jax.data import captions, records
from sana_jax.data.sources import access

_CHUNK = 64


def low_scores(
  source: records.Source, minimum: float, *, num_threads: int = 16
) -> dict[int, str]:
  """Finds pictures whose prompt fits them worse than a CLIP score.

  The prompt is the caption that `captions.choose` takes for "first"; one
  without a score is good enough.

  Args:
    minimum: of the score (CLIP's times 100); 0: nothing is read.

  Returns:
    For the number of every record that is left out, why it is; a record whose
    captions cannot be read is among them.

  Source: NVlabs/Sana, `del_img_clip_thr` of its data configs.
  """
  if not minimum:
    return {}

  def find(start: int) -> list[tuple[int, str]]:
    indices = range(start, min(start + _CHUNK, len(source)))
    reasons = [(index, _reason(source, index, minimum)) for index in indices]
    return [(index, reason) for index, reason in reasons if reason is not None]

  with futures.ThreadPoolExecutor(num_threads) as pool:
    found = pool.map(find, range(0, len(source), _CHUNK))
    return dict(pair for pairs in found for pair in pairs)


def _reason(source: records.Source, index: int, minimum: float) -> str | None:
  try:
    found = (
      source.captions(index)
      if isinstance(source, access.FileSource)
      else source[index].captions
    )
  except (OSError, ValueError) as error:
    return str(error)
  score = captions.prompt(found).score if found else None
  if score is None or score >= minimum:
    return None
  return f"the CLIP score of its prompt is below {minimum:g}"
