"""Command that trains a tokenizer on the captions of the bundled emoji.

python -m sana_jax.data.emoji_tokenizer --output_dir=runs/tokenizer
"""

import sys
from collections.abc import Iterator, Sequence

from absl import app, flags

from sana_jax.data import emoji, tokenizer_training


def captions(source: emoji.EmojiSource) -> Iterator[str]:
  """Yields names followed by keywords, in lower case as prompts are."""
  for i in range(len(source)):
    record = source[i]
    yield ", ".join((record["name"], *record["keywords"])).lower()


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("output_dir", None, "Of the files.", required=True)
  flags.DEFINE_integer("vocab_size", 2048, "Number of token ids.")
  flags.DEFINE_string("data_dir", None, "Another set of emoji.")


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    tokenizer_training.train_tokenizer(
      captions(emoji.load("train", values.data_dir)),
      values.vocab_size,
      values.output_dir,
    )
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"emoji_tokenizer: {error}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
