-- Try for the lease of the machine that sends notices, hold it, or give it back. Tell and be told what was delivered.
-- KEYS: election, deliveries. request: instance, a token of its process, whether it wants the lease, its length, since when
-- the deliveries of all machines are to be told, deliveries to add, and how the machine is shown.
-- Returns {1 if it has the lease, 1 if there are more deliveries, the time to ask for them from, how the machine is shown that
-- has the lease or "" if none has, and deliveries}.
local ELECTION_TTL = 86400000
local DELIVERIES_KEPT = 1209600000000
local MOST_DELIVERIES = 20000
local AT_ONCE = 1000

local instance, token, wanted, length, since, added, shown = unpack(request, 1, 7)

-- A server that has lost its data, or has taken the place of another one, does not know who has a lease. So none is given
-- until all have ended. INFO may be forbidden; then a failover goes unnoticed.
local info = redis.pcall("INFO", "replication")
local known = redis.call("HGET", KEYS[1], "server")
local server = type(info) == "string" and string.match(info, "master_replid:(%w+)") or known or "unknown"
local began = tonumber(redis.call("HGET", KEYS[1], "began") or 0)
if known ~= server or began > now then
  redis.call("DEL", KEYS[1])
  redis.call("HSET", KEYS[1], "server", server, "began", string.format("%.0f", now))
  began = now
end

local holder = redis.call("HGET", KEYS[1], "holder")
local ends = tonumber(redis.call("HGET", KEYS[1], "ends") or 0)
if ends > now + length then -- the clock was set back
  ends = now + length
  redis.call("HSET", KEYS[1], "ends", string.format("%.0f", ends))
end
local has = 0
if not wanted then
  -- The next process of this instance may have it by now.
  if holder == instance and redis.call("HGET", KEYS[1], "token") == token then
    redis.call("HDEL", KEYS[1], "holder", "ends")
    holder = false
  end
elseif now - began >= length and (holder == instance or ends <= now) then
  redis.call("HSET", KEYS[1], "holder", instance, "token", token, "ends", string.format("%.0f", now + length))
  redis.call("HSET", KEYS[1], "shown", instance .. " " .. shown)
  holder, ends, has = instance, now + length, 1
end
redis.call("PEXPIRE", KEYS[1], ELECTION_TTL)

for _, delivery in ipairs(added) do
  redis.call("ZADD", KEYS[2], string.format("%.0f", now), delivery)
end
if #added > 0 then
  redis.call("ZREMRANGEBYSCORE", KEYS[2], "-inf", string.format("%.0f", now - DELIVERIES_KEPT))
  redis.call("ZREMRANGEBYRANK", KEYS[2], 0, -MOST_DELIVERIES - 1)
  redis.call("PEXPIRE", KEYS[2], DELIVERIES_KEPT / 1000)
end
if since > now then -- the clock was set back
  since = 0
end
local from = string.format("%.0f", since)
local found = redis.call("ZRANGEBYSCORE", KEYS[2], from, "+inf", "WITHSCORES", "LIMIT", 0, AT_ONCE)
local answer = {has, #found == 2 * AT_ONCE and 1 or 0, since, ""}
if holder and ends > now then
  local named = redis.call("HGET", KEYS[1], "shown") or "" -- of another one, if an earlier release has the lease
  local begin = holder .. " "
  answer[4] = string.sub(named, 1, #begin) == begin and string.sub(named, #begin + 1) or holder
end
for at = 1, #found, 2 do
  answer[#answer + 1] = found[at]
  answer[3] = tonumber(found[at + 1])
end
return cmsgpack.pack(answer)
