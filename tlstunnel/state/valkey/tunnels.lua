-- Change how many tunnels a holder has under each key, or set it.
-- KEYS: holders, then those of the tunnels. request: holder, the replaced holders, and for each key a number to add.
-- With a fourth element, true, the numbers replace those that this holder and the replaced ones had.
-- Returns {0, now}, or {1, now} for a holder that is not current, which changes nothing.
local holder, replaced, numbers, absolute = unpack(request, 1, 4)
if not is_current(holder) then
  return cmsgpack.pack({1, now})
end
for index, number in ipairs(numbers) do
  local key = KEYS[index + 1]
  if absolute then
    for _, name in ipairs(replaced) do
      redis.call("HDEL", key, name)
    end
    redis.call("HDEL", key, holder)
  end
  if number ~= 0 and redis.call("HINCRBY", key, holder, number) <= 0 then
    redis.call("HDEL", key, holder)
  end
  redis.call("PEXPIRE", key, TUNNELS_TTL)
end
return cmsgpack.pack({0, now})
