"""Profiles for ``streamcnn profile``: peak memory and time of one training update, by tile size."""

from streamcnn.profiling.figures import write_figures
from streamcnn.profiling.measure import ProfileFailed, profile_tiles
from streamcnn.profiling.page import render_page
from streamcnn.profiling.results import make_folder, write_results
from streamcnn.profiling.tile_profile import TileProfile

__all__ = [
    "ProfileFailed",
    "TileProfile",
    "make_folder",
    "profile_tiles",
    "render_page",
    "write_figures",
    "write_results",
]
