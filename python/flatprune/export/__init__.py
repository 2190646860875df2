"""The pruned network as a file, and back: `model.pt` of a run, and what other programs read."""

from flatprune.export.any_model import save
from flatprune.export.exporting import (
    EXPORT_FILES,
    EXPORTS_FILE,
    FORMATS,
    Export,
    check_export,
    export_run,
    read_exports,
)
from flatprune.export.loading import fresh_network, load, read_saved
from flatprune.export.model_file import MODEL_FILE, save_model
from flatprune.export.pretrained import update_config
from flatprune.export.saved import take_tensors
from flatprune.export.subject import INPUTS

__all__ = [
    "EXPORTS_FILE",
    "EXPORT_FILES",
    "FORMATS",
    "INPUTS",
    "MODEL_FILE",
    "Export",
    "check_export",
    "export_run",
    "fresh_network",
    "load",
    "read_exports",
    "read_saved",
    "save",
    "save_model",
    "take_tensors",
    "update_config",
]
