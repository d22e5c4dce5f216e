"""Edits: what is done to each client's update before the aggregator sees it. One file each."""

from fedmerge.edits.breadcrumbs import Breadcrumbs
from fedmerge.edits.clip import Clip
from fedmerge.edits.dare import Dare
from fedmerge.edits.della import Della
from fedmerge.edits.edit import Edit, EditContext
from fedmerge.edits.linearised import Linearised
from fedmerge.edits.lines import Lines
from fedmerge.edits.trim import Trim

__all__ = ["Breadcrumbs", "Clip", "Dare", "Della", "Edit", "EditContext", "Linearised", "Lines", "Trim"]
