"""tinyvgpt: VideoGPT from scratch. A book that runs, and the package that it builds."""

from tinyvgpt import video
from tinyvgpt.data import open_dataset
from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.videogpt import VideoGPT
from tinyvgpt.vqvae import VQVAE, VQVAEConfig

__version__ = "0.1.0"
__all__ = ["GPT", "VQVAE", "GPTConfig", "VQVAEConfig", "VideoGPT", "open_dataset", "video"]
