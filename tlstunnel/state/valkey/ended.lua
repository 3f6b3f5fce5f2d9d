-- Tell all machines which tags have been ended, and be told which others have.
-- KEYS: ended. request: since when those of all machines are to be told (0 at first), and texts to add.
-- Returns {the time to ask for from next, 1 if there are more, and for each: how many microseconds ago it was told, its text}.
local KEPT = 3600000000
local FIRST = 60000000
local MOST = 2000
local AT_ONCE = 200
local LONGEST = 4096

local since, added = unpack(request, 1, 2)

for _, text in ipairs(added) do
  redis.call("ZADD", KEYS[1], string.format("%.0f", now), text)
end
if #added > 0 then
  redis.call("ZREMRANGEBYSCORE", KEYS[1], "-inf", string.format("%.0f", now - KEPT))
  redis.call("ZREMRANGEBYRANK", KEYS[1], 0, -MOST - 1)
  redis.call("PEXPIRE", KEYS[1], KEPT / 1000)
end
if since == 0 or since > now then -- a machine begins, or the clock was set back
  since = now - FIRST
end
local from, to = string.format("%.0f", since), string.format("%.0f", now)
local found = redis.call("ZRANGEBYSCORE", KEYS[1], from, to, "WITHSCORES", "LIMIT", 0, AT_ONCE)
local last, more = since, 0
local answer = {0, 0}
for at = 1, #found, 2 do
  local text, told = found[at], math.floor(tonumber(found[at + 1]))
  -- What has another form was not told by a machine.
  if #text <= LONGEST and string.find(text, "^[%w_=-]+$") then
    answer[#answer + 1] = now - told
    answer[#answer + 1] = text
  end
  last = math.max(last, told)
end
if #found == 2 * AT_ONCE then
  more = 1
  last = last > since and last or since + 1
end
answer[1], answer[2] = last, more
return cmsgpack.pack(answer)
