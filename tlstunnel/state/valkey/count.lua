-- Count the open tunnels under each key.
-- KEYS: holders, then those of the tunnels. request: holder.
-- Returns {0, now, and the number for each key}, or {1, now} for a holder that is not current.
if not is_current(request[1]) then
  return cmsgpack.pack({1, now})
end
local answer = {0, now}
for index = 2, #KEYS do
  answer[index + 1] = count_tunnels(KEYS[index])
end
return cmsgpack.pack(answer)
