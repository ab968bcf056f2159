"""The synthetic stream world: what happens, how it looks, and questions with true answers.

Follow a frame: world (what happens) -> compose or render (112x112 pixels) -> questions (what is true right after it).
"""
