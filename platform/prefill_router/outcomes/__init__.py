"""Outcomes: which target model answered which query correctly, at what length and cost."""
