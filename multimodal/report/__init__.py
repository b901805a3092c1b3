"""One HTML page that puts runs side by side, from what their folders hold; no model is loaded.

`folders` finds and reads them; `results`, `overview`, `curves` and `pictures` say what is shown; `page` draws it.
"""
