"""SkyPilot's errors as a code and one line, for those who cannot import its classes."""

import re

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MESSAGE_CHARS = 600
CODES = {  # SkyPilot's exceptions, by name: the class's own first, then its parents'
    "NoCloudAccessError": "no_credentials",
    "InvalidCloudCredentials": "no_credentials",
    "CloudUserIdentityError": "no_credentials",
    "ResourcesUnavailableError": "no_capacity",
    "ProvisionPrechecksError": "no_machine",
    "ResourcesMismatchError": "no_machine",
    "ApiServerConnectionError": "away",
    "ServerTemporarilyUnavailableError": "away",
    "RequestInterruptedError": "away",
    "NetworkError": "away",
    "ConnectionError": "away",
    "Timeout": "away",
    "ApiServerAuthenticationError": "login",
    "PermissionDeniedError": "login",
    "APIVersionMismatchError": "version",
    "APINotSupportedError": "version",
    "ClusterNotUpError": "no_controller",
    "ClusterDoesNotExist": "not_found",
    "InvalidSkyPilotConfigError": "config",
    "NotSupportedError": "unsupported",
    "StorageError": "storage",
    "StorageSpecError": "storage",
}
# the cloud's own words, where SkyPilot hands them on
QUOTA = re.compile(
    r"quota|vcpulimitexceeded|limitexceeded|maxspotinstancecountexceeded|limit exceeded", re.I
)
# what the optimizer says when the catalog has no such machine at all, wherever one looks
NO_MACHINE = re.compile(r"catalog does not contain|no cloud or region|no launchable resource", re.I)
NO_CLOUD = re.compile(r"no cloud access|no cloud is enabled|no enabled clouds?|credentials", re.I)


def code_of(error):
    """What kind of error it is."""
    if isinstance(error, ModuleNotFoundError) and error.name == "sky":
        return "no_sky"
    text = message_of(error)
    found = next((CODES[k.__name__] for k in type(error).__mro__ if k.__name__ in CODES), "unknown")
    if found in ("no_capacity", "no_machine", "unknown"):
        if QUOTA.search(text):
            return "quota"
        if NO_CLOUD.search(text):
            return "no_credentials"
        if NO_MACHINE.search(text):
            return "no_machine"
    if found == "unknown" and isinstance(error, (ValueError, TypeError)):
        return "refused"
    return found


def message_of(error):
    """In one line, with what was tried: SkyPilot's own texts are tables in colour."""
    parts = [str(error) or type(error).__name__]
    parts += [str(each) for each in getattr(error, "reasons", None) or ()]
    tried = [str(each) for each in getattr(error, "failover_history", None) or ()]
    if tried:
        parts.append("tried: " + "; ".join(dict.fromkeys(tried)))
    text = " ".join(ANSI.sub("", " ".join(parts)).split())
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 1] + "…"
