"""Which records a run leaves out although they could be read."""

from sana_jax.data import captions, records
from sana_jax.data.sources import access


def require_score(source: records.Source, index: int, minimum: float) -> None:
  """Refuses a record whose prompt fits its picture worse than a CLIP score.

  The prompt is the caption that `captions.choose` takes for "first"; one
  without a score is good enough.

  Args:
    minimum: of the score (CLIP's times 100); 0: nothing is read.

  Raises:
    ValueError: the score is lower, or the captions cannot be read.

  Source: NVlabs/Sana, `del_img_clip_thr` of its data configs.
  """
  if not minimum:
    return
  found = (
    source.captions(index)
    if isinstance(source, access.FileSource)
    else source[index].captions
  )
  score = captions.prompt(found).score if found else None
  if score is not None and score < minimum:
    raise ValueError(f"the CLIP score of its prompt is below {minimum:g}")
