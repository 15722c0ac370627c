"""The decision log of a server, read again: decisions with their answers and feedback, replays, and labels."""
