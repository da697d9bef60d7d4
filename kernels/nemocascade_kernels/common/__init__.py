"""Code shared by several ops. An op imports its own folder and this one, never another op's."""
