"""Files that go into exports as they are: they need the other library, and nothing of this one."""
