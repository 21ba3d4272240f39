"""For web frameworks. Nothing here is loaded unless an application asks for it by name."""
