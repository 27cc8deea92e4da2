"""Preference data: from files or the Hub to token ids, with every row counted."""
