"""Whether the server works."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from .errors import ERROR_RESPONSES

router = APIRouter(tags=["server"], responses=ERROR_RESPONSES)


class Health(BaseModel):
    """The server takes requests; one that stops answers with an error instead."""

    status: Literal["ok"] = Field(default="ok", description="Always this.")


@router.get("/health")
async def health() -> Health:
    """Says that the server takes requests; needs no key."""
    return Health()
