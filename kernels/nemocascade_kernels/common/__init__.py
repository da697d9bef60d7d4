"""What several ops share. An op imports its own folder and this one, never another op's."""
