"""Checkpoint folders: what lies in them, and how each format becomes arrays and QTensors."""

from .files import CheckpointFiles as CheckpointFiles
from .write import write_folder as write_folder
