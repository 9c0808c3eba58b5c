"""Devices elsewhere: a bundle goes there over SSH or by hand, its results come back and are held to the same rules."""
