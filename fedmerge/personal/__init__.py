"""Models of clients' own, as a merge describes them: the shared model, a mask of it, and a number."""

from fedmerge.personal.packed_bits import pack_bits, unpack_bits
from fedmerge.personal.personal_part import PersonalPart, parts_in, personalise, remembered_parts

__all__ = ["PersonalPart", "pack_bits", "parts_in", "personalise", "remembered_parts", "unpack_bits"]
