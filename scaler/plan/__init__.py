"""The planning core: a world of frozen values goes in, actions with their reasons come out. Pure."""
