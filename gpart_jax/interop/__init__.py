"""Where adapters and adapted models come from and go to: the authors' PEFT checkpoints, Hugging Face directories."""

from gpart_jax import requirements

requirements.check_flax()
