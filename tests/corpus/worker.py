"""An edge worker that is imported as a module."""


async def fetch(request: object, env: object) -> None: ...
