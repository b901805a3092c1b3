.PHONY: check test slow format pins

check: ## all that CI runs
	bash .ci/run

test: ## the fast suite
	uv run pytest

slow: ## real processes, kills, several ranks
	uv run pytest -m slow

format: ## put the code in order
	uv run ruff check --fix .
	uv run ruff format .

pins: ## the newest versions that pyproject.toml allows; those of tests/peers/*.txt by hand, as CONTRIBUTING.md says
	uv run --no-project --python ">=3.11" scripts/pin.py
