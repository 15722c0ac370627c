"""Checks of the labels of an outcomes table: suspicious labels are counted and listed, and nothing is changed."""
