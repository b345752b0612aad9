"""The lab: what makes experiments repeatable. It may import the whole lesson."""
