"""The same cache, made by an Apache Beam pipeline instead of hosts.

python -m sana_jax.precompute.beam --source=DIR --checkpoint=DIR --output=DIR \
  --runner=DirectRunner

Flags that are none of the command's own are Beam's. Every worker must see
--source, --checkpoint and --output under the same path. Needs
`pip install sana_jax[beam]`.
"""

import sys

from absl import app, flags, logging
from apache_beam.options import pipeline_options

from sana_jax.precompute import beam_pipeline, finalise, task


def main(argv: list[str]) -> int:
  logging.set_verbosity(logging.INFO)
  options = pipeline_options.PipelineOptions(argv[1:])
  try:
    output = task.output_directory(flags.FLAGS.output)
    completed = beam_pipeline.run(task.of_flags(), output, options)
  except (OSError, ValueError) as error:
    sys.stderr.write(f"precompute.beam: {error}\n")
    return 1
  logging.info("%s", finalise.describe(completed.manifest))
  return 3 if completed.manifest.skipped else 0


if __name__ == "__main__":
  task.define_flags()
  flags.adopt_module_key_flags(task)  # for --help
  flags.DEFINE_string("output", None, "Of the cache.", required=True)
  app.run(main, flags_parser=lambda args: flags.FLAGS(args, known_only=True))
