-- Tell that a holder is alive, and remove those whose heartbeat is missing.
-- KEYS: holders, answers. request: holder, and the replaced holders of its instance that are to be dropped.
-- Returns {0, now}, or {1, now} for a holder that is not current.
local holder, dropped = unpack(request, 1, 2)
if not is_current(holder) then
  return cmsgpack.pack({1, now})
end
redis.call("HSET", KEYS[1], holder, now)
for _, name in ipairs(dropped) do
  redis.call("HDEL", KEYS[1], name)
end
local fields = redis.call("HGETALL", KEYS[1])
for at = 1, #fields, 2 do
  local beat = tonumber(fields[at + 1])
  if fields[at] ~= "secret" and beat and not is_fresh(beat) then
    redis.call("HDEL", KEYS[1], fields[at])
  end
end
redis.call("PEXPIRE", KEYS[1], HOLDERS_TTL)
redis.call("PEXPIRE", KEYS[2], HOLDERS_TTL)
return cmsgpack.pack({0, now})
