"""`/v1/models`: what can be asked."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from .discovery import ModelFile
from .errors import ERROR_RESPONSES, ApiError
from .state import ServerState, State

router = APIRouter(tags=["models"], responses=ERROR_RESPONSES)


class ModelEntry(BaseModel):
    """A model that requests can name."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(description="When its file was last changed, in seconds since 1970.")
    owned_by: Literal["llama-moe"] = "llama-moe"
    size_bytes: int = Field(description="Size of its files.")
    state: Literal["unloaded", "loading", "loaded"] = Field(description="Whether it is in memory.")


class ModelList(BaseModel):
    """Every model."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


def _entry(state: ServerState, file: ModelFile) -> ModelEntry:
    loaded = any(served.name == file.name for served in state.pool.loaded())
    loading = file.name in state.pool.loading()
    return ModelEntry(
        id=file.name,
        created=file.created,
        size_bytes=file.size_bytes,
        state="loaded" if loaded else "loading" if loading else "unloaded",
    )


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    """Lists the models, those that are not loaded included."""
    files = await state.pool.files()
    return ModelList(data=[_entry(state, file) for file in files.values()])


@router.get("/v1/models/{model:path}")
async def get_model(state: State, model: Annotated[str, Path(description="Its name.")]) -> ModelEntry:
    """Describes one model."""
    files = await state.pool.files()
    if model not in files:
        raise ApiError(404, f"the model {model!r} does not exist", param="model", code="model_not_found")
    return _entry(state, files[model])
