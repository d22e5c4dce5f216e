"""How a name in a configuration becomes a part: kinds of parts, how they are written, where they are found."""
